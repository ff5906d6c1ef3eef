"""Programs that `check_ecosystem.py` tries: what each is told to do, and how the table shows it."""

from __future__ import annotations

from dataclasses import dataclass

NATIVE = "native"
FORMS = {
    "pair": ("--method", "svd-llm", "--storage", "pair"),
    "pivot": ("--method", "svd-llm", "--storage", "pivot"),
    "modegpt": ("--method", "modegpt"),
    NATIVE: ("--method", "nystrom", "--attention", "dense", "--allocate", "equal-widths", "--ratio", "0.1"),
}
TASK = """task: check
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}]
"""
PIPELINE = (
    "import sys, transformers as t; "
    "said = t.pipeline('text-generation', sys.argv[1], trust_remote_code=True)('Once', max_new_tokens=5); "
    "assert said[0]['generated_text']"
)
LOAD = (
    "import sys, torch, transformers as t; "
    "whole = dict(trust_remote_code=True, dtype=torch.float32); "
    "model = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], **whole).eval(); "
    "ids = torch.tensor([[1, 5, 9, 30]]); "
)
EXPORT = LOAD + (
    "program = torch.export.export(model, (), dict(input_ids=ids, use_cache=False), strict=False); "
    "torch.testing.assert_close(program.module()(input_ids=ids, use_cache=False).logits, "
    "model(input_ids=ids, use_cache=False).logits)"
)
COMPILE = LOAD + (
    "made = torch.compile(model, fullgraph=True, backend='aot_eager'); torch.no_grad().__enter__(); "
    "torch.testing.assert_close(made(input_ids=ids, use_cache=False).logits, "
    "model(input_ids=ids, use_cache=False).logits)"
)
ONNX = LOAD + (
    "import tempfile, onnxruntime; place = tempfile.mkdtemp() + '/model.onnx'; "
    "run = lambda self, ids: self.model(input_ids=ids, use_cache=False).logits; "
    "made = type('Logits', (torch.nn.Module,), {'forward': run})(); made.model = model; "
    "torch.onnx.export(made.eval(), (ids,), place, dynamo=True, verbose=False); "
    "session = onnxruntime.InferenceSession(place, providers=['CPUExecutionProvider']); "
    "(found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()}); "
    "torch.testing.assert_close(torch.from_numpy(found), made(ids), rtol=1e-3, atol=1e-3)"
)
# A step of one length, and merged: the same as before; saved and loaded again, too. In single precision, in which what
# a step changes is more than rounding.
LORA = LOAD + (
    "import peft, tempfile; place = tempfile.mkdtemp(); names = sys.argv[2:] or None; "
    "config = peft.LoraConfig(r=2, target_modules=names[0] if names == ['all-linear'] else names, "
    "task_type='CAUSAL_LM'); made = peft.get_peft_model(model, config); "
    "step = torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=1.0); "
    "before = made(input_ids=ids, labels=ids).loss; before.backward(); "
    "torch.nn.utils.clip_grad_norm_(made.parameters(), 0.1); step.step(); "
    "after = made.eval()(input_ids=ids, labels=ids); assert after.loss < before; "
    "merged = made.merge_and_unload(); merged.save_pretrained(place); "
    "again = t.AutoModelForCausalLM.from_pretrained(place, **whole).eval(); "
    "[torch.testing.assert_close(one(input_ids=ids).logits, after.logits, rtol=1e-3, atol=1e-3) "
    "for one in (merged, again)]"
)
SFT = LOAD + (
    "import datasets, peft, tempfile, trl; tokenizer = t.AutoTokenizer.from_pretrained(sys.argv[1]); "
    "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token; "
    "data = datasets.Dataset.from_list([{'text': 'Once upon a time there was a frog.'}] * 4); "
    "settings = trl.SFTConfig(output_dir=tempfile.mkdtemp(), max_steps=1, per_device_train_batch_size=2, "
    "report_to='none', use_cpu=True, bf16=False, max_length=32); "
    "trainer = trl.SFTTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer, "
    "peft_config=peft.LoraConfig()); trainer.train(); made = trainer.model.eval(); "
    "after = made(input_ids=ids).logits; "
    "torch.testing.assert_close(made.merge_and_unload()(input_ids=ids).logits, after, rtol=1e-3, atol=1e-3)"
)
EMBED = (
    "import sys, sentence_transformers as s; "
    "model = s.SentenceTransformer(sys.argv[1], trust_remote_code=True, device='cpu'); "
    "model.tokenizer.pad_token = model.tokenizer.eos_token; "
    "assert model.encode(['Once upon a time', 'A frog']).shape[0] == 2"
)
NATIVELY = (
    "import sys, transformers as t; "
    "model, found = t.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True); "
    "assert not any(found[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))"
)
EVALUATE = ("run", "--model", "hf", "--model_args", "pretrained={model},trust_remote_code=True", "--tasks", "check")
EVALUATE = (*EVALUATE, "--include_path", "{tasks}", "--limit", "4", "--device", "cpu", "--batch_size", "4")


@dataclass(frozen=True)
class Row:
    """A program: the package that it is of, how the table shows its command, and the words after `python`.

    Attributes
    ----------
    installed
        Whether this package is there for it.
    stock
        Whether it is for native exports alone.
    """

    package: str
    shown: str
    words: tuple[str, ...]
    installed: bool = False
    stock: bool = False


ROWS = (
    Row("transformers", "`pipeline(…, trust_remote_code=True)`", ("-c", PIPELINE, "{model}")),
    Row(
        "lm_eval",
        "`lm_eval run --model hf --model_args pretrained=…,trust_remote_code=True`",
        ("-m", "lm_eval", *EVALUATE),
    ),
    Row(
        "lm_eval",
        "`python -m lowrank_compress.launch lm_eval run --model hf --model_args pretrained=…`",
        (
            "-m",
            "lowrank_compress.launch",
            "lm_eval",
            *(word.replace(",trust_remote_code=True", "") for word in EVALUATE),
        ),
        installed=True,
    ),
    Row(
        "accelerate",
        "`accelerate launch -m lm_eval run …`",
        ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "lm_eval", *EVALUATE),
    ),
    Row("torch", "`torch.export.export`", ("-c", EXPORT, "{model}")),
    Row("torch", "`torch.compile(fullgraph=True)`", ("-c", COMPILE, "{model}")),
    Row("onnxruntime", "`torch.onnx.export(…, dynamo=True)`", ("-c", ONNX, "{model}")),
    Row(
        "peft",
        '`LoraConfig(target_modules=["q_proj", "v_proj"])`, a step, merged, saved, loaded',
        ("-c", LORA, "{model}", "q_proj", "v_proj"),
    ),
    Row("peft", "`LoraConfig()`, the same", ("-c", LORA, "{model}")),
    Row("peft", '`LoraConfig(target_modules="all-linear")`, the same', ("-c", LORA, "{model}", "all-linear")),
    Row("trl", "`SFTTrainer(…, peft_config=LoraConfig())`, a step, merged", ("-c", SFT, "{model}")),
    Row("sentence_transformers", "`SentenceTransformer(…, trust_remote_code=True)`", ("-c", EMBED, "{model}")),
    Row(
        "transformers", "`from_pretrained(…)` without package and remote code", ("-c", NATIVELY, "{model}"), stock=True
    ),
)

TEXTS = ["A frog sat by the pond.", "Once upon a time there was a frog who sang at night and slept by day.", "Rain"]
# What this package makes of the texts: run where it is installed, for the other programs to meet.
OURS = (
    "import sys, torch, transformers as t; from pathlib import Path; from safetensors.torch import save_file; "
    "from lowrank_compress import load; from lowrank_compress.model.checkpoint import Checkpoint; "
    "from lowrank_compress.model.embedding import embedding_of; "
    "model, tokenizer = load(sys.argv[1]).eval(), t.AutoTokenizer.from_pretrained(sys.argv[1]); "
    "pooled = embedding_of(Checkpoint(Path(sys.argv[1]))).of; torch.no_grad().__enter__(); "
    f"made = [pooled(model(**tokenizer(text, return_tensors='pt')).last_hidden_state) for text in {TEXTS}]; "
    "save_file({'embeddings': torch.cat(made)}, sys.argv[2])"
)
SENTENCES = (
    "import sys, tempfile, torch, sentence_transformers as s; from safetensors.torch import load_file; "
    f"texts = {TEXTS}; place = tempfile.mkdtemp(); close = torch.testing.assert_close; "
    "loaded = lambda path: s.SentenceTransformer(path, trust_remote_code=True, device='cpu'); "
    "embedded = lambda model: model.eval().encode(texts, convert_to_tensor=True).cpu(); "
    "model = loaded(sys.argv[1]); found = embedded(model); "
)
SAME = SENTENCES + "close(found, load_file(sys.argv[2])['embeddings'], rtol=1e-4, atol=1e-5)"
ALONE = SENTENCES + "close(found, torch.stack([model.encode(x, convert_to_tensor=True) for x in texts]))"
KEPT = SENTENCES + "model.save_pretrained(place); close(embedded(loaded(place)), found)"
STEP = SENTENCES + (
    "import datasets, peft; from sentence_transformers.losses import MultipleNegativesRankingLoss as Loss; "
    "data = datasets.Dataset.from_dict({'anchor': texts[:2], 'positive': texts[1:]}); "
    "settings = s.SentenceTransformerTrainingArguments(output_dir=tempfile.mkdtemp(), max_steps=1, use_cpu=True, "
    "per_device_train_batch_size=2, learning_rate=1e-3, report_to='none', save_strategy='no'); "
    "trained = lambda: s.SentenceTransformerTrainer(model, settings, data, loss=Loss(model)).train(); "
)
TRAINED = STEP + (
    "trained(); after = embedded(model); assert (after - found).abs().max() > 1e-5; "
    "model.save_pretrained(place); close(embedded(loaded(place)), after)"
)
ADAPTED = STEP + (
    "config = peft.LoraConfig(r=4, target_modules=['query', 'value']); "
    "made = peft.get_peft_model(model[0].auto_model, config); trained(); after = embedded(model); "
    "assert (after - found).abs().max() > 1e-5; made.merge_and_unload(); "
    "close(embedded(model), after, rtol=1e-3, atol=1e-4); "
    "model.save_pretrained(place); close(embedded(loaded(place)), after, rtol=1e-3, atol=1e-4)"
)
FEATURES = (
    "import sys, transformers as t; "
    "said = t.pipeline('feature-extraction', sys.argv[1], trust_remote_code=True)('Once'); assert len(said[0]) > 2"
)
EMBEDDING_ROWS = (
    Row(
        "sentence_transformers",
        "`SentenceTransformer(…, trust_remote_code=True)`: embeddings as ours",
        ("-c", SAME, "{model}", "{ours}"),
    ),
    Row("sentence_transformers", "`encode` of texts together and one by one", ("-c", ALONE, "{model}")),
    Row("sentence_transformers", "`save_pretrained`, loaded again", ("-c", KEPT, "{model}")),
    Row("sentence_transformers", "`SentenceTransformerTrainer`, a step, saved, loaded", ("-c", TRAINED, "{model}")),
    Row(
        "peft",
        '`LoraConfig(target_modules=["query", "value"])`, a step of that, merged, saved, loaded',
        ("-c", ADAPTED, "{model}"),
    ),
    Row("transformers", '`pipeline("feature-extraction", …, trust_remote_code=True)`', ("-c", FEATURES, "{model}")),
)

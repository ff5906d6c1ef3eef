"""What stages leave on disk: manifests, block files and the lock. Standard library and safetensors only."""

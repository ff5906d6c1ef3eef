"""The command line: thin commands over the stages. Nothing slow is imported before a command runs."""

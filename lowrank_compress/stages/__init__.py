"""The stages: pure functions of a config and of the directories they read."""

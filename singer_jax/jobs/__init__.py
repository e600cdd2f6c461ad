"""One file a command: the story of its run. Only here is a `ConfigDict` seen."""

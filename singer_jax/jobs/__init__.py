"""One file a command: the story of its run."""

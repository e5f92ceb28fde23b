"""How fast a training step is, where its time goes, and what it uses of the machine."""

"""What features look like without labels: how many directions they fill, and whether they have collapsed."""

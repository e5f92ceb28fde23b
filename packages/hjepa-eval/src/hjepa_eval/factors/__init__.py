"""What features keep of known factors of the images."""

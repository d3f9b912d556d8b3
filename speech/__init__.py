"""Speech in, text out."""

"""Speech in: sounds, and the texts that a Whisper model hears in them."""

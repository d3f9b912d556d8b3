"""Messages and pictures become what the model sees: token ids, patches, positions."""

"""What a client gets: documents and streams of events in the forms of the interface."""

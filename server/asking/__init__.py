"""What a request asks for: its body, its fields, its messages and pictures, each read and checked."""

"""What is not computed twice: prefixes of prompts, pictures, the next words of an answer."""

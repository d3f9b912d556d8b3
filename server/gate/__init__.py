"""Who may come in, and how much of what they send is taken."""

"""What a run looks like to people: lines, tables, a picture, a page."""

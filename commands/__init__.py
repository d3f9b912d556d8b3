"""The commands of `autoglm`: a module for each, named as it is, and what several of them share."""

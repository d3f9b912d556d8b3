"""The runtime on the instruction set of phones, emulated: are its numbers the same?"""

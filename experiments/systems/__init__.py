"""The systems that the paper names, on the same pairs, with the same measures."""

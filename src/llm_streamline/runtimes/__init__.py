"""A saved model in the programs that run it elsewhere: in their formats, run by them, held against transformers."""

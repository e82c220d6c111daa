"""One module per framework: its file format as rows of suite/dumps/dump.py."""

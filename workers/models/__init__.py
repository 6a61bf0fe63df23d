"""Models a trial can fine-tune, one file or folder each."""

"""Rewards, one file each: (images, prompts) -> one number per image."""

"""The messages of the contract, made from proto/ by generate.py; never edited."""

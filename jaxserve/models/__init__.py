"""What is computed: one decoder, and families that are data."""

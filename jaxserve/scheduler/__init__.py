"""Decides what runs in each step: block accounting, prefix cache, admission, preemption."""

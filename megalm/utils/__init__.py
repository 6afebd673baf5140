"""Helpers that every part of megalm uses. They import no torch, and of megalm only `errors` and each other."""

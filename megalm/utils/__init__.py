"""Small things that every part of megalm uses. No torch; of megalm only `errors` and each other."""

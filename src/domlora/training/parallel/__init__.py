"""Many domains adapted at once on a frozen base, each by itself on one worker."""

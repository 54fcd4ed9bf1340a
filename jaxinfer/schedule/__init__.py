"""What a whole batch demands and shares, how much of it is left, and the order in which it is served."""

"""What a layout costs before anything is started, as integers: memory by part, shares of the model, balance, bubble."""

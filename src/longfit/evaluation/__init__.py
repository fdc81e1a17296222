"""Floor 7: does the tuned model really read further?"""

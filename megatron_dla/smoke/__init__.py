"""`dla smoke`: one command that shows the stack works on this machine before cluster hours are spent."""

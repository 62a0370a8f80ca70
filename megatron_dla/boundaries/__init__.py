"""`dla boundaries`: what the slots of an exported model do on a text, as a page and a picture."""

"""Between stores and those who read many objects: a disk cache, hedged reads."""

"""Operations, a folder each: the meaning in plain torch (`reference.py`), faster implementations beside it."""

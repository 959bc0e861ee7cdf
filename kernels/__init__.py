"""Operations: one folder each, with the meaning in plain torch (`reference.py`) and faster implementations beside it."""

"""How weights are stored: element types, integers with scales, folds."""

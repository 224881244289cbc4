"""Error statistics: the energies of a quantisation error's parts, without the parts."""

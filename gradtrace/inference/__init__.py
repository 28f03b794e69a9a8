"""From spectra to findings: comparisons of groups, with what may be said of them. Needs no torch."""

"""BiBench: what methods that train networks of one bit are worth, by six tracks (Qin et al. 2023, arXiv:2301.11233)."""

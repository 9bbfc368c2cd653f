"""The two engines that compute rows of direct effects: linear (fast) and autograd (slow, the reference)."""

"""The HEAR linear-probe protocol for any HEAR module: it sees encoders only through the HEAR functions."""

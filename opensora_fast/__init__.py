"""The thin model layer: MMDiT, autoencoders, flow matching, sampling and the command line."""

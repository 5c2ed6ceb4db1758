"""Images in, vectors out: decoding, backbones, encoders and whitening."""

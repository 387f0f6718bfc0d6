"""One Trainer for both variants, with everything that keeps a long training alive."""

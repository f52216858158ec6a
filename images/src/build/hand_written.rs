//! Livepatch modules of our own (`images/modules/`), each for one thing that patching must do or refuse.

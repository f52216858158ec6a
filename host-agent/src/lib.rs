//! The vmpatch host agent.

#include "kpatch_output.h"

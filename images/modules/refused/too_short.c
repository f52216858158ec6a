/* A patch of a function of two bytes: a jump has no place in it. */
#include "livepatch.h"

static void livepatch_untrain_ret(void)
{
}

LIVEPATCH(PATCH(srso_untrain_ret, livepatch_untrain_ret));

/* Calls sysinfo(), which takes or gives back a reference if it is that of the module references. */
#include "sysinfo.h"

int main(void)
{
	return see_sysinfo(0x4e52);
}

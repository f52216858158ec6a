/*
 * CVE-2026-52923: a message queue that is asked for by number (msg_next_id) gets
 * the next free index, even one beyond the last that an id can hold. The flawed
 * ipc_addid gives the second queue of index 32767 the index 32768; the fixed one
 * says ENOSPC. A queue of index 32768 can't be removed: it stays, and the next run
 * of this program gets the one behind.
 */
#include "result.h"

#include <fcntl.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <unistd.h>

static int queue(void)
{
	static const char last[] = "32767";
	int fd = open("/proc/sys/kernel/msg_next_id", O_WRONLY);

	if (fd < 0 || write(fd, last, sizeof(last) - 1) < 0)
		cannot_tell("msg_next_id");
	close(fd);
	return msgget(IPC_PRIVATE, 0600);
}

int main(void)
{
	int first, id, error;

	first = queue();
	if (first != 32767)
		cannot_tell("a message queue with the last index");
	id = queue();
	error = errno;
	if (msgctl(first, IPC_RMID, NULL))
		cannot_tell("removing the first queue");
	errno = error;
	if (id >= 0) {
		printf("flawed: a second queue with the last index got the id %d\n", id);
		return FLAWED;
	}
	if (errno != ENOSPC)
		cannot_tell("a second queue with the last index");
	puts("fixed: a second queue with the last index got ENOSPC");
	return FIXED;
}

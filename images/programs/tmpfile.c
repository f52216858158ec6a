/*
 * CVE-2026-72379: open(O_TMPFILE) makes a file whose owner the file system has no
 * number for. The fixed vfs_tmpfile says EOVERFLOW, as for any other new file.
 * The file system is a tmpfs of a user namespace that knows only one user, and
 * the program, outside of it, is another.
 */
#include "result.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

static void write_file(pid_t pid, const char *name, const char *text)
{
	char path[64];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", pid, name);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		cannot_tell(path);
	close(fd);
}

/* Says a byte when the namespaces are there, waits for one, mounts, says another. */
static void inside(int in, int out)
{
	char byte = 0;

	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) || write(out, &byte, 1) != 1 ||
	    read(in, &byte, 1) != 1 || setresgid(0, 0, 0) || setresuid(0, 0, 0) ||
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
	    mount("none", "/tmp", "tmpfs", 0, "mode=1777,uid=0,gid=0") ||
	    write(out, &byte, 1) != 1)
		cannot_tell("a tmpfs in a user namespace");
	pause();
}

static int open_tmpfile(void)
{
	int to[2], from[2], fd, error, ordinary;
	char path[64], byte = 0;
	pid_t child;

	if (pipe(to) || pipe(from))
		cannot_tell("a pipe");
	child = fork();
	if (child == 0)
		inside(to[0], from[1]);
	close(from[1]);
	if (child < 0 || read(from[0], &byte, 1) != 1)
		cannot_tell("a user namespace");
	write_file(child, "setgroups", "deny");
	write_file(child, "uid_map", "0 1000 1");
	write_file(child, "gid_map", "0 1000 1");
	if (write(to[1], &byte, 1) != 1 || read(from[0], &byte, 1) != 1)
		cannot_tell("the user namespace's mount");
	snprintf(path, sizeof(path), "/proc/%d/root/tmp/file", child);
	ordinary = open(path, O_RDWR | O_CREAT, 0600);
	if (ordinary >= 0 || errno != EOVERFLOW)
		cannot_tell("an ordinary file there, which nobody may make");
	*strrchr(path, '/') = '\0';
	fd = open(path, O_RDWR | O_TMPFILE, 0600);
	error = errno;
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	errno = error;
	return fd;
}

int main(void)
{
	if (open_tmpfile() >= 0) {
		puts("flawed: O_TMPFILE with an owner that has no number returned a file");
		return FLAWED;
	}
	if (errno != EOVERFLOW)
		cannot_tell("O_TMPFILE");
	puts("fixed: O_TMPFILE with an owner that has no number returned EOVERFLOW");
	return FIXED;
}

/*
 * A guest that is busy while it moves: each part checks what it has written
 * before, so that anything lost, torn or done twice shows.
 *
 *   load MIB DISK PORT   writes and checks that much memory again and again,
 *                        writes and checks blocks of the disk, and echoes TCP
 *                        and UDP at the port; 0, - and 0 leave a part out. Says
 *                        "started", and at SIGTERM what it has done:
 *                        "memory N wrong N disk N wrong N"
 *
 * Ends with 0 where nothing was wrong.
 */
#include "result.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 1024
#define WORDS (BLOCK / sizeof(uint64_t))

static atomic_ulong memory_rounds, memory_wrong, disk_writes, disk_wrong;
static const char *disk;
static size_t words;
static int port;

static uint64_t mix(uint64_t a, uint64_t b)
{
	return (a ^ (b << 32)) * 0x9e3779b97f4a7c15u + b;
}

static void *write_memory(void *unused)
{
	volatile uint64_t *memory = malloc(words * sizeof(*memory));
	uint64_t round;
	size_t i;

	for (round = 0;; round++) {
		for (i = 0; i < words; i++)
			memory[i] = mix(i, round);
		for (i = 0; i < words; i++)
			if (memory[i] != mix(i, round))
				memory_wrong++;
		memory_rounds++;
	}
	return unused;
}

static void fill(uint64_t *block, uint64_t number, uint64_t turn)
{
	size_t i;

	for (i = 0; i < WORDS; i++)
		block[i] = mix(number * WORDS + i, turn);
}

/* Blocks in an order that looks random; each is read back before it is written again. */
static void *write_disk(void *unused)
{
	static uint64_t turns[BLOCKS];
	static uint64_t block[WORDS] __attribute__((aligned(BLOCK)));
	static uint64_t expected[WORDS];
	uint64_t turn, number;
	int fd = open(disk, O_RDWR | O_DIRECT | O_DSYNC);

	if (fd < 0)
		cannot_tell(disk);
	for (turn = 1;; turn++) {
		number = mix(turn, 7) >> 32 & (BLOCKS - 1);
		if (turns[number]) {
			fill(expected, number, turns[number]);
			if (pread(fd, block, BLOCK, number * BLOCK) != BLOCK || memcmp(block, expected, BLOCK))
				disk_wrong++;
		}
		fill(block, number, turn);
		if (pwrite(fd, block, BLOCK, number * BLOCK) != BLOCK)
			disk_wrong++;
		turns[number] = turn;
		disk_writes++;
	}
	return unused;
}

static void *echo(void *unused)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) };
	int one = 1, server = socket(AF_INET, SOCK_STREAM, 0), client;
	char bytes[4096];
	ssize_t len;

	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(server, (struct sockaddr *)&at, sizeof(at)) || listen(server, 1))
		cannot_tell("the port");
	for (;;) {
		client = accept(server, NULL, NULL);
		setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
		while ((len = read(client, bytes, sizeof(bytes))) > 0)
			if (write(client, bytes, len) != len)
				break;
		close(client);
	}
	return unused;
}

static void *echo_datagrams(void *unused)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_port = htons(port) }, from;
	int server = socket(AF_INET, SOCK_DGRAM, 0);
	socklen_t from_len;
	char bytes[2048];
	ssize_t len;

	if (bind(server, (struct sockaddr *)&at, sizeof(at)))
		cannot_tell("the port");
	for (;;) {
		from_len = sizeof(from);
		len = recvfrom(server, bytes, sizeof(bytes), 0, (struct sockaddr *)&from, &from_len);
		if (len > 0)
			sendto(server, bytes, len, 0, (struct sockaddr *)&from, from_len);
	}
	return unused;
}

static void start(void *(*part)(void *))
{
	pthread_t thread;

	if (pthread_create(&thread, NULL, part, NULL))
		cannot_tell("a thread");
}

int main(int argc, char **argv)
{
	sigset_t end;
	int signal;

	if (argc != 4)
		return UNKNOWN;
	sigemptyset(&end);
	sigaddset(&end, SIGTERM);
	pthread_sigmask(SIG_BLOCK, &end, NULL);
	words = strtoul(argv[1], NULL, 10) << 20 >> 3;
	disk = argv[2];
	port = atoi(argv[3]);
	if (words)
		start(write_memory);
	if (strcmp(disk, "-"))
		start(write_disk);
	if (port) {
		start(echo);
		start(echo_datagrams);
	}
	puts("started");
	fflush(stdout);
	sigwait(&end, &signal);
	printf("memory %lu wrong %lu disk %lu wrong %lu\n", memory_rounds, memory_wrong, disk_writes, disk_wrong);
	return memory_wrong || disk_wrong ? FLAWED : FIXED;
}
